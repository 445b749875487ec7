"""Tables, plots and the HTML report: what a person reads after a run. Needs no torch."""
