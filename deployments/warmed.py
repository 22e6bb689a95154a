"""What a fork server does once for all its runs, besides its imports: a third of a second of each."""

from nightshift.judging.plots import reliability
from nightshift.judging.report import html_template, markdown_template
from nightshift.storage.s3 import read_descriptions

read_descriptions()
html_template()
markdown_template()
reliability([])  # the first figure reads the fonts
