"""A model outside Python: three ONNX graphs, and a page that runs them in a browser."""

KINDS = ("onnx", "page")
WEIGHTS = ("fp32", "int8", "int4")
