"""Methods that only look: they return a record and change no output.

A probe is a :class:`mmlm.Method` with a name under which its record is stored (``measures``).
Attach it like any method, beside others if you like, and ask :func:`mmlm.measured` for the records
once the answers are complete.
"""
