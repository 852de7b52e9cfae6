"""Choice: one of several texts that could continue a prompt."""
