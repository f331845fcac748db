"""Pictures and videos: decoding, strict for training and fault-tolerant for users, and encoding."""
