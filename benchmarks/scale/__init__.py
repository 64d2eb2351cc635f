"""From what ``bench_round`` measured to what a federation of any size would take."""
