"""What joins training, exporting and measuring into runs that a configuration describes."""
