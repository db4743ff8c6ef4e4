"""The report of a finished run: answers, judges, win rates, plots and the page."""
