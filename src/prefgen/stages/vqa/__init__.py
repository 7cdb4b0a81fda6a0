"""Stage vqa."""
