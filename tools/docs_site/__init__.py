"""The site's parts that are made: links out of ``docs/`` and the notebook's page (`hooks`), pictures (`__main__`)."""
