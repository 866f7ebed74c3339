"""Published models with random weights, and a small probe for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor | dict[str, Tensor], dict[str, Any]]  # model, probe, options

TORCHVISION = {
    "alexnet": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "densenet121": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_32": 64,
    "maxvit_t": 224,
}
TIMM = {
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "mixer_s32_224": 224,
    "resmlp_12_224": 224,
    "gmlp_s16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "convnext_atto": 64,
    "resnetv2_50": 64,
    "nfnet_f0": 64,
    "tf_efficientnetv2_b0": 64,
    "efficientformer_l1": 224,
    "mobilevit_xxs": 64,
    "poolformer_s12": 64,
    "levit_128s": 224,
    "xcit_nano_12_p16_224": 224,
    "edgenext_xx_small": 64,
    "repvgg_a0": 64,
    "davit_tiny": 64,
    "eva02_tiny_patch14_224": 224,
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
VOCABULARY = 64


def models() -> dict[str, Callable[[], Built]]:
    """Returns functions that build a model, its probe and the options it takes, by name."""
    built = {f"torchvision {name}": _torchvision(name, size) for name, size in TORCHVISION.items()}
    built["torchvision resnet18 FPN"] = _feature_pyramid
    built |= {f"timm {name}": _timm(name, size) for name, size in TIMM.items()}
    built |= {
        f"transformers {name}": lambda build=build: build() for name, build in TRANSFORMERS.items()
    }
    return built


def _torchvision(name: str, size: int) -> Callable[[], Built]:
    def build() -> Built:
        import torchvision

        options = {"image_size": size} if name.startswith("vit") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
        return model, torch.randn(2, 3, size, size), {}

    return build


def _timm(name: str, size: int) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=5)
        return model, torch.randn(2, 3, size, size), {}

    return build


def _feature_pyramid() -> Built:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    model = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return model, torch.randn(2, 3, 64, 64), {"output": "0", "likelihood": "gaussian"}


def _text(labels: bool = False) -> dict[str, Tensor]:
    """Two sentences of token numbers, the second of them padded."""
    ids = torch.randint(5, VOCABULARY, (2, 6))
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    text = {"input_ids": ids, "attention_mask": attention}
    return text | {"labels": ids.masked_fill(attention == 0, -100)} if labels else text


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _bert() -> Built:
    import transformers as t

    config = t.BertConfig(vocab_size=VOCABULARY, num_labels=3, **SMALL)
    return t.BertForSequenceClassification(config), _text(), {}


def _bert_masked() -> Built:
    import transformers as t

    return t.BertForMaskedLM(t.BertConfig(vocab_size=VOCABULARY, **SMALL)), _text(), {}


def _roberta() -> Built:
    import transformers as t

    config = t.RobertaConfig(vocab_size=VOCABULARY, num_labels=3, **SMALL)
    return t.RobertaForTokenClassification(config), _text(), {}


def _distilbert() -> Built:
    import transformers as t

    config = t.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=48, num_labels=3
    )
    return t.DistilBertForSequenceClassification(config), _text(), {}


def _gpt2() -> Built:
    import transformers as t

    config = t.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
        loss_type="ForCausalLMLoss",
    )
    return t.GPT2LMHeadModel(config), _text(labels=True), {}


def _llama() -> Built:
    import transformers as t

    config = t.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **SMALL)
    return t.LlamaForCausalLM(config), _text(labels=True), {}


def _t5() -> Built:
    import transformers as t

    config = t.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    text = _text()
    return t.T5ForConditionalGeneration(config), text | {"decoder_input_ids": text["input_ids"]}, {}


def _bart() -> Built:
    import transformers as t

    config = t.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=16,
        num_labels=3,
    )
    ids = torch.cat([_text()["input_ids"], torch.full((2, 1), config.eos_token_id)], 1)
    return t.BartForSequenceClassification(config), {"input_ids": ids}, {}


def _vit() -> Built:
    import transformers as t

    config = t.ViTConfig(image_size=32, patch_size=8, num_labels=3, **SMALL)
    return t.ViTForImageClassification(config), _images(), {}


def _clip() -> Built:
    import transformers as t

    config = t.CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=8, **SMALL)
    return t.CLIPVisionModelWithProjection(config), _images(), {"output": "image_embeds"}


def _wav2vec2() -> Built:
    import transformers as t

    config = t.Wav2Vec2Config(
        num_labels=3,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        **SMALL,
    )
    return t.Wav2Vec2ForSequenceClassification(config), {"input_values": torch.randn(2, 400)}, {}


TRANSFORMERS = {
    "BERT": _bert,
    "BERT, masked": _bert_masked,
    "RoBERTa": _roberta,
    "DistilBERT": _distilbert,
    "GPT-2": _gpt2,
    "Llama": _llama,
    "T5": _t5,
    "BART": _bart,
    "ViT": _vit,
    "CLIP, images": _clip,
    "wav2vec 2.0": _wav2vec2,
}
