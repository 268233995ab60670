"""Figures and tables from arrays and labels. The lens, models and jobs call this package; it imports none of them.

figures.py      new figures, saved with the same bytes every time; the only module that creates them
tables.py       columns as a small HTML table and as a pandas DataFrame
labels.py       the tokens of a sequence, and how a figure names them
profile.py      overview, tracks, maps and strongest partners of one sequence
statistics.py   one statistic of one layer on given axes
contacts.py     a contact map
variants.py     the effects of all substitutions in a protein
"""
