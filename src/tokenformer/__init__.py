"""TokenFormer."""
