"""What producer, worker and model_build share: documents, shards, the ledger, the run's folder, the artifact.

This package imports no accelerator's library, and Celery and Redis only in ``broker``, so that it is fast to import.
"""
