"""Trains the embedded base model that ships in `router/models/base`."""
