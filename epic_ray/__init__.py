"""epic-ray: explain any pretrained image classifier by prototypes, at ImageNet scale, on Ray."""

__version__ = "0.1.0"
