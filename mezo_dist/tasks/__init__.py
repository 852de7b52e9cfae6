"""Tasks: a YAML file says which data, prompt, label words and metric; code here turns that into token sequences."""
