"""The pages of the site that are made from the code, one module each; see tools/build_docs.py."""
