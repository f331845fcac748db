"""Pictures and videos to frames."""
