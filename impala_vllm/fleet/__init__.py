"""The fleet: which server holds which prefix, and where a turn is best served."""
