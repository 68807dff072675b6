"""What producer, worker and model_build agree on: documents, shards, the ledger, the run's folder, the artifact.

This package imports the standard library and pyarrow only, so that whoever needs the agreement
does not pay for an accelerator's libraries.
"""
