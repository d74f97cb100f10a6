"""From files of rows to batches of ids: rows -> template -> tokenize -> loader -> collate."""
