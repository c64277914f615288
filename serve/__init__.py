"""Online services on Ray Serve. None yet: they arrive with the instruction head."""
