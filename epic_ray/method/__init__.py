"""The mathematics: torch, numpy, scipy and scikit-learn; no Ray, no settings, no files but weights."""
