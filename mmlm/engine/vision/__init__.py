"""Pictures: the tower, what it sees, what leaves it, and where its features stand in a prompt."""
