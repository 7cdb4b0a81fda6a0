"""prefgen: learn one person's visual taste from a few images and make a diffusion model follow it."""

__version__ = "0.1.0"
