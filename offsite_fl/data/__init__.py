"""A data owner's files or datasets, turned into batches for tuning and evaluation."""
