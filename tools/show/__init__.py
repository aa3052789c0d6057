"""What a person looks at: terminal, HTML pages, plots, drawings."""
