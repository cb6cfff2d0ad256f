"""What a person reads after a run: failure texts (failure.py) and C reproducers (emit_c.py)."""
