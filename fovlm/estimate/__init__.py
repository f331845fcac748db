"""What a run is and costs before it starts: parameters, FLOPs, memory."""
