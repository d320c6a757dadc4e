// What llama.cpp would allocate on CUDA devices, without a GPU and without CUDA.
//
// llama.cpp's dry load (no_alloc) asks a backend only for names, buffer sizes and which operations it runs; it computes
// nothing. This program registers devices that answer those questions as ggml-cuda does (ggml/src/ggml-cuda/ggml-cuda.cu
// and fattn.cu, b10488, compute capability 8.0 and later), then prints llama.cpp's own figures in bytes:
//
//   dry_cuda --model FILE -c 4096 -ub 512 …        one load, llama-fit-params' flags
//   dry_cuda < file                                 one load a line
//
// Output: one JSON object a load, {"CUDA0": [weights, context, compute], …, "Host": […]}.
// DRY_DEVICES is the number of devices (2). --server-outputs as the first flag reserves as many output rows as llama-server
// does (one a sequence; server_output_limits in tools/server/server-context.cpp) instead of one a token.

#include "arg.h"
#include "common.h"
#include "fit.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-cpu.h"
#include "llama.h"
#include "log.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int64_t ROW_PADDING         = 512;  // MATRIX_ROW_PADDING: quantized rows are padded to it
constexpr int64_t OFFLOAD_BATCH       = 32;   // GGML_OP_OFFLOAD_MIN_BATCH: from here host weights are copied over
constexpr int64_t KQ_STRIDE           = 256;  // FATTN_KQ_STRIDE
constexpr size_t  ALIGNMENT           = 128;

struct device_context {
    std::string name;
    ggml_backend_buffer_type buft;
};

bool flash_attention_runs(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3];
    const int64_t group = q->ne[2] / k->ne[2];
    float max_bias = 0.0f;
    memcpy(&max_bias, (const float *) op->op_params + 1, sizeof(float));
    bool grouped = group >= 2 && mask && max_bias == 0.0f && k->ne[1] % KQ_STRIDE == 0;
    for (const ggml_tensor * t : {q, k, v, mask}) {
        for (int i = 1; t && !ggml_is_quantized(t->type) && i < GGML_MAX_DIMS; i++) {
            grouped = grouped && t->nb[i] % 16 == 0;
        }
    }
    switch (k->ne[0]) {
        case 40: case 64: case 72: case 80: case 96: case 112: case 128: case 256:
            if (v->ne[0] != k->ne[0]) { return false; }
            break;
        case 192: if (v->ne[0] != 128 || !grouped || group % 8)  { return false; } break;
        case 320: if (v->ne[0] != 256 || !grouped || group % 32) { return false; } break;
        case 512: if (v->ne[0] != 512 || !grouped) { return false; } break;
        case 576: if (v->ne[0] != 512 || !grouped) { return false; } break;
        default: return false;
    }
    if (k->type != v->type || (mask && mask->ne[2] != 1)) { return false; }
    switch (k->type) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_BF16: case GGML_TYPE_Q4_0: case GGML_TYPE_Q8_0: return true;
        default: return false;
    }
}

// Bytes behind the result for keys and values as f16, which every kernel for more than two tokens reads.
size_t flash_attention_size(const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2];
    size_t end = ggml_nbytes(op);
    const bool same_cells = v->view_src && (v->view_src == k || (v->view_src == k->view_src && v->view_offs == k->view_offs));
    const bool vector_kernel = q->ne[1] <= 2 && q->ne[0] <= 256 && q->ne[0] % 64 == 0 && ggml_is_quantized(k->type);
    if (!flash_attention_runs(op) || vector_kernel) { return end; }
    if (k->type != GGML_TYPE_F16) { end = GGML_PAD(end, ALIGNMENT) + 2*ggml_nelements(k); }
    if (v->type != GGML_TYPE_F16 && !same_cells) { end = GGML_PAD(end, ALIGNMENT) + 2*ggml_nelements(v); }
    return end;
}

bool is_float(ggml_type type) { return type == GGML_TYPE_F32 || type == GGML_TYPE_F16; }

bool supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (const ggml_tensor * src : op->src) {
        if (src && src->buffer) {
            ggml_backend_dev_t owner = src->buffer->buft->device;
            if (owner && owner != dev && !ggml_backend_buft_is_host(src->buffer->buft)) { return false; }
        }
    }
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    switch (op->op) {
        case GGML_OP_UNARY: return ggml_is_contiguous(a);
        case GGML_OP_GLU:   return ggml_is_contiguous_1(a);
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return a->nb[0] == ggml_element_size(a) && b->nb[0] == ggml_element_size(b)
                && !(b->type == GGML_TYPE_F16 && a->type != GGML_TYPE_F16)
                && a->type != GGML_TYPE_TQ1_0 && a->type != GGML_TYPE_TQ2_0;
        case GGML_OP_GET_ROWS:
            return a->type != GGML_TYPE_NVFP4 && ((a->type != GGML_TYPE_IQ4_NL && a->type != GGML_TYPE_MXFP4) || a->ne[0] % 256 == 0);
        case GGML_OP_SET_ROWS:
            return a->type == GGML_TYPE_F32 || (op->type == GGML_TYPE_F16 && a->type == GGML_TYPE_F16);
        case GGML_OP_CPY:
            return !(ggml_is_quantized(a->type) && ggml_is_quantized(op->type) && a->type != op->type);
        case GGML_OP_REPEAT: return is_float(a->type);
        case GGML_OP_ADD: case GGML_OP_SUB: case GGML_OP_MUL: case GGML_OP_DIV:
            return is_float(a->type) && is_float(b->type) && is_float(op->type);
        case GGML_OP_NORM: case GGML_OP_RMS_NORM: case GGML_OP_L2_NORM: case GGML_OP_SUM: return ggml_is_contiguous_rows(a);
        case GGML_OP_SSM_SCAN:
            return op->src[3]->ne[0] == 1
                ? (a->ne[0] == 128 || a->ne[0] == 256) && a->ne[1] % 16 == 0
                : ggml_get_op_params_i32(op, 0) <= 1 && a->ne[0] == 16 && a->ne[1] == 1 && a->ne[2] % 128 == 0 && op->src[4]->ne[1] == 1;
        case GGML_OP_SSM_CONV: return a->ne[1] % 128 == 0;
        case GGML_OP_ROPE: return a->nb[0] == ggml_type_size(a->type) && ggml_is_contiguous_2(a);
        case GGML_OP_ACC: case GGML_OP_IM2COL: case GGML_OP_CONV_2D: return ggml_is_contiguous(a) && ggml_is_contiguous(b);
        case GGML_OP_ROLL: return a->type == GGML_TYPE_F32 && ggml_is_contiguous(a);
        case GGML_OP_SUM_ROWS: case GGML_OP_MEAN: case GGML_OP_GROUP_NORM: return ggml_is_contiguous(a);
        case GGML_OP_FLASH_ATTN_EXT: return flash_attention_runs(op);
        default: return true;
    }
}

int64_t batch_size(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS: return 0;
        case GGML_OP_MUL_MAT:  return op->ne[1];
        case GGML_OP_MUL_MAT_ID: case GGML_OP_ROPE: return op->ne[2];
        default: return ggml_nrows(op);
    }
}

const char * buft_name(ggml_backend_buffer_type_t buft) { return ((device_context *) buft->device->context)->name.c_str(); }

// Nothing is computed, so host memory serves where llama.cpp insists on a real buffer.
ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    void * memory = aligned_alloc(ALIGNMENT, GGML_PAD(size, ALIGNMENT));  // never freed: the program ends soon
    ggml_backend_buffer_t buffer = memory ? ggml_backend_cpu_buffer_from_ptr(memory, size) : nullptr;
    if (buffer) { buffer->buft = buft; }
    return buffer;
}

size_t buft_alignment(ggml_backend_buffer_type_t) { return ALIGNMENT; }

size_t buft_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    size_t size = t->op == GGML_OP_FLASH_ATTN_EXT ? flash_attention_size(t) : ggml_nbytes(t);
    if (ggml_is_quantized(t->type) && t->ne[0] % ROW_PADDING) {
        size += ggml_row_size(t->type, ROW_PADDING - t->ne[0] % ROW_PADDING);
    }
    return size;
}

const char * host_name(ggml_backend_buffer_type_t) { return "CUDA_Host"; }

ggml_backend_buffer_type_t host_buft(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type host = {
        { host_name, buft_alloc, ggml_backend_cpu_buffer_type()->iface.get_alignment, nullptr,
          ggml_backend_cpu_buffer_type()->iface.get_alloc_size, ggml_backend_cpu_buffer_type()->iface.is_host },
        dev->reg->iface.get_device(dev->reg, 0), nullptr };
    return &host;
}

// backend

const char * backend_name(ggml_backend_t backend) { return ((device_context *) backend->device->context)->name.c_str(); }
void backend_free(ggml_backend_t backend) { delete backend; }
void backend_nothing(ggml_backend_t) {}
ggml_status backend_compute(ggml_backend_t, ggml_cgraph *) { return GGML_STATUS_FAILED; }
void event_nothing(ggml_backend_t, ggml_backend_event_t) {}

// device

const char * device_name(ggml_backend_dev_t dev) { return ((device_context *) dev->context)->name.c_str(); }
void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 1ull << 40; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name = props->description = device_name(dev);
    props->device_id = nullptr;
    props->type = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
    props->caps = {};
    props->caps.async = props->caps.host_buffer = props->caps.events = true;
}

ggml_backend_t device_backend(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x64, 0x72, 0x79 };
    ggml_backend_i iface = {};
    iface.get_name      = backend_name;
    iface.free          = backend_free;
    iface.synchronize   = backend_nothing;
    iface.graph_compute = backend_compute;
    iface.event_record  = event_nothing;
    iface.event_wait    = event_nothing;
    return new ggml_backend{ &guid, iface, dev, nullptr };
}

ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t dev) { return &((device_context *) dev->context)->buft; }
bool supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == device_buft(dev); }
bool offload_op(ggml_backend_dev_t, const ggml_tensor * op) { return batch_size(op) >= OFFLOAD_BATCH; }
ggml_backend_event_t event_new(ggml_backend_dev_t dev) { return new ggml_backend_event{ dev, nullptr }; }
void event_free(ggml_backend_dev_t, ggml_backend_event_t event) { delete event; }
void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t) {}

// registry

std::vector<ggml_backend_device *> & devices() { static std::vector<ggml_backend_device *> all; return all; }
const char * reg_name(ggml_backend_reg_t) { return "CUDA"; }
size_t reg_count(ggml_backend_reg_t) { return devices().size(); }
ggml_backend_dev_t reg_device(ggml_backend_reg_t, size_t i) { return devices()[i]; }

void register_devices(int count) {
    static ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, { reg_name, reg_count, reg_device, nullptr }, nullptr };
    for (int i = 0; i < count; i++) {
        auto * ctx = new device_context{ "CUDA" + std::to_string(i), {} };
        auto * dev = new ggml_backend_device{
            { device_name, device_name, device_memory, device_type, device_props, device_backend, device_buft, host_buft,
              nullptr, supports_op, supports_buft, offload_op, event_new, event_free, event_synchronize },
            &reg, ctx };
        ctx->buft = { { buft_name, buft_alloc, buft_alignment, nullptr, buft_alloc_size, nullptr }, dev, nullptr };
        devices().push_back(dev);
    }
    ggml_backend_register(&reg);
}

int measure(std::vector<std::string> words) {
    bool server_outputs = false;
    for (size_t i = 0; i < words.size(); i++) {
        if (words[i] == "--server-outputs") { server_outputs = true; words.erase(words.begin() + i); break; }
    }
    std::vector<char *> argv;
    for (auto & word : words) { argv.push_back(word.data()); }
    common_params params;
    if (!common_params_parse((int) argv.size(), argv.data(), params, LLAMA_EXAMPLE_FIT_PARAMS)) { return 1; }
    auto mparams = common_model_params_to_llama(params);
    auto cparams = common_context_params_to_llama(params);
    if (server_outputs) {
        cparams.n_outputs_max = params.n_parallel;
        cparams.n_outputs_max_per_seq = 1;
    }
    std::vector<ggml_backend_dev_t> devs;
    uint32_t layers = 0, ctx_train = 0, experts = 0;
    try {
        const auto level = getenv("DRY_VERBOSE") ? GGML_LOG_LEVEL_DEBUG : GGML_LOG_LEVEL_ERROR;
        const auto rows = common_get_device_memory_data(params.model.path.c_str(), &mparams, &cparams, devs, layers, ctx_train, experts, level);
        printf("{");
        for (size_t i = 0; i < rows.size(); i++) {
            const char * name = i < devs.size() ? ggml_backend_dev_name(devs[i]) : "Host";
            printf("%s\"%s\": [%zu, %zu, %zu]", i ? ", " : "", name, rows[i].model, rows[i].context, rows[i].compute);
        }
        printf("}\n");
    } catch (const std::exception & error) {
        printf("{\"error\": \"%s\"}\n", error.what());
    }
    fflush(stdout);
    return 0;
}

}  // namespace

int main(int argc, char ** argv) {
    const char * count = getenv("DRY_DEVICES");
    register_devices(count ? atoi(count) : 2);
    if (!getenv("DRY_VERBOSE")) { llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr); }
    if (argc > 1) { return measure({ argv, argv + argc }); }
    for (std::string line; std::getline(std::cin, line);) {
        std::vector<std::string> words = { argv[0] };
        std::istringstream stream(line);
        for (std::string word; stream >> word;) { words.push_back(word); }
        if (words.size() > 1) { measure(words); }
    }
}
