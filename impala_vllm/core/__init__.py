"""Policy: facts and `now` in, decisions out. Standard library only."""
