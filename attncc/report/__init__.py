"""What is reported of each site: the model of a report, its text and its pictures."""
