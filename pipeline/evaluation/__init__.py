"""What a finished model is worth: answers, judges, win rates, plots and the report's page."""
