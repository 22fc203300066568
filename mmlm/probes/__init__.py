"""Methods that only look: they return a record and change no output."""
