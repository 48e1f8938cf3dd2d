"""What is relevant: the record every judge fills, the offline judge, and the label stage."""
