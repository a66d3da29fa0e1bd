"""How replicas agree (sync) and how one replica is cut over ranks (cut)."""
