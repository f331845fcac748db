"""Vision transformers that can be the encoder: `families.py` lists them, one file each says how it is laid out."""
