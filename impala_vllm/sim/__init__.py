"""Replicas in virtual time that run the policies which ship, and re-implemented ones to compare them with."""
