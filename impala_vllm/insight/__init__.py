"""What an operator learns from recorded load: why prefixes miss, and what it costs."""
