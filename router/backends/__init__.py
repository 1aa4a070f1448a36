"""Concrete models behind the seams of `router.interfaces`: one file per backend."""
