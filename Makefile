# make demo: train, test and draw on data that need no download.   make sweep: a small grid of positions on them.
# make test: the tests.   make faults: runs that are killed, starved of disk, ...   make lint: ruff, and imports.
# make gpu: on a machine with a card, what only a card can show; eight minutes, writes gpu/gpu.json and gpu/gpu.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo sweep test faults gpu lint clean

demo: .venv/run
	-@$(BIN)/python visualize_attention.py --model_path timm:deit_tiny_patch16_224.fb_in1k --image_path docs/cat.jpg \
		--layer_num 11 --overlay --output_dir demo || echo "(without a network there is no picture of the photo)"
	$(BIN)/python cifar_main.py --data_set DIGITS --model_path demo/best_model.pth --overwrite \
		--cls_pos 3 --reg_pos 2 --embed_dim 96 --depth 6 --num_heads 3 \
		--epochs 20 --batch_size 64 --lr 2e-3 --mixup 0 --cutmix 0 --reprob 0
	$(BIN)/python visualize_attention.py --model_path demo/best_model.pth --layer_num 5 --output_dir demo
	@echo
	@echo "The demo is done. Look at:"
	@echo "  demo/attention_cat_block11.pdf             what CLS of a pretrained DeiT attends to in a photo, if there was a network"
	@echo "  demo/best_model.pth                        the trained model"
	@echo "  demo/training_curves.png (and .pdf)        loss, accuracy, learning rate; numbers in demo/log.txt"
	@echo "  demo/attention_DIGITS_test0_block5.pdf     what CLS and each register attend to in block 5"

sweep: .venv/run
	$(BIN)/python position_sweep.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

faults: .venv/run
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python tests/faults/faults.py

gpu: .venv/run
	$(BIN)/python tests/gpu/gpu.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_house.py

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/run: requirements.txt | .venv/bin/python
	$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

.venv/test: requirements.txt requirements-extra.txt requirements-test.txt | .venv/bin/python
	$(BIN)/pip install --quiet -r requirements-test.txt
	@touch $@ .venv/run

clean:
	rm -rf .venv demo sweeps
