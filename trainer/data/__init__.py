"""Data: rows become records, records become token ids with target weights, and a plan deals them to ranks."""
