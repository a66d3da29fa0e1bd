"""How one replica is spread over ranks."""
