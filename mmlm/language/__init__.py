"""What captions say: words, their dictionary forms, and the COCO objects they name, offline.

Scorers (`benchmarks`) and the preference-data pipelines (`data_tools`) must read a caption in the
same way, so the reading stands here, with the tables it needs in ``mmlm/language/data``.
"""
