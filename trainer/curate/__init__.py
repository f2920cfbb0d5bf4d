"""Curation: raw trajectories and questions in, those that are worth training on out.

rows        what a row is, the hash of its content, how it is written again
rules       what reading a trajectory tells        texts     what a tool said, compared
looks       whether two pictures look the same     duplicates
execute     the tools run again                    models    a model and a judge are asked
rubric      what the judge is told
stages      what a stage is, and those that need no model
journal     what was found out, on disk
pipeline    the stages in their order              outputs   the folder and its files
report      the page
"""
