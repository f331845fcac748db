"""The network: encoder, looks, language model, and what runs it frame by frame."""
