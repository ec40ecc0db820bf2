"""The data: a name or path becomes checked text, text becomes ids, ids become a run's batches."""
