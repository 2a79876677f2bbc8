"""Is what breaks a prefix named, and nothing named where nothing broke? Recorded sessions with seeded changes."""
