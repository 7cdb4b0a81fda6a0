"""Stage align: sem embeddings into the text space of the diffusion model, by distribution."""
