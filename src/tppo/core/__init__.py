"""What every room stands on: settings, stages, run folders, files, models, texts, tables, numbers, local pages."""
