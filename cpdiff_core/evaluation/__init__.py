"""How good the generated weights are, how sure that is, and whether they are new (Sec. 4)."""
