"""Data generation: the embedded world and the preference-data pipelines.

* ``world/`` - pictures with exact truth.
* ``sentinel/`` - sentence-level preference pairs; ``mia/`` - multi-image pairs; ``micl/`` - tasks
  that need their demonstrations; ``convert/`` - published formats in, training columns out.
* ``generators/`` and ``detectors/`` - the models these pipelines use, behind two protocols.
* ``stages.py`` - how a step over many records runs: resumed, sharded, in one process or many;
  ``records.py`` - what it leaves on the disk; ``pictures.py`` - pictures with their identity.
"""
