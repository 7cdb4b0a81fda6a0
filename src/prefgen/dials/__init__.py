"""What turning a user's dials does: both scales, the number of images, updates instead of a build."""
